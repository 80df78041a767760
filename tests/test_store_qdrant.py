"""The adapter to Qdrant, in the client's in-process mode."""
import numpy as np
import pytest

from search.segment import Chunk

pytest.importorskip("qdrant_client", reason="the extra vectordb is not installed")
from search.qdrant import QdrantStore  # noqa: E402


def chunk(i, doc):
    return Chunk(f"id{i}", doc, 0, 4, 1, "Title", "", f"text {i}")


def test_it_finds_what_an_exact_search_finds_and_adding_again_adds_nothing(tmp_path):
    r = np.random.default_rng(0)
    vectors = r.normal(size=(300, 16)).astype(np.float32)
    chunks = [chunk(i, f"{i % 3}.md") for i in range(300)]
    for where in (":memory:", str(tmp_path / "db")):
        store = QdrantStore(where, "notes", 16)
        store.add(chunks, vectors)
        store.add(chunks[:50], vectors[:50])
        assert store.client.count("notes").count == 300
        query = r.normal(size=16).astype(np.float32)
        cosines = vectors @ query / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)
        best = np.argsort(-cosines)[:5]
        found = store.search(query, 5)
        assert [c for c, _ in found] == [chunks[i] for i in best]
        assert np.allclose([s for _, s in found], cosines[best], atol=1e-5)
        store.delete("0.md")
        assert store.client.count("notes").count == 200
        assert all(c.doc != "0.md" for c, _ in store.search(query, 100))
        store.client.close()
    with pytest.raises(ValueError, match="16 numbers, not 8"):
        QdrantStore(str(tmp_path / "db"), "notes", 8)
