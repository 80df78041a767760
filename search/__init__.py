"""The search engine under rag.py: documents are cut into chunks, indexed, and found again."""
