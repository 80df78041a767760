"""For every test: the repository on sys.path, and one thread, so that sums round the same way."""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)
