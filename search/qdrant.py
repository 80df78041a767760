"""
Chunks in Qdrant instead of files, for when they have outgrown one machine (the extra `vectordb`).

    store = QdrantStore("http://localhost:6333", "notes", dim=384)      or ":memory:", or a folder
    store.add(chunks, vectors)         # the same chunk again replaces itself
    store.delete("notes.md")
    store.search(vector, k=5)          # [(Chunk, cosine)], best first

A store is these three methods; write the same three for another engine. docs/rag.md says when to
move, and to what.
"""
import uuid
from dataclasses import asdict

import numpy as np

from search.segment import Chunk


class QdrantStore:
    def __init__(self, where: str, name: str, dim: int):
        """Open a collection, made if it is not there. Raises ValueError if qdrant-client is missing
        or the collection holds vectors of another length."""
        try:
            from qdrant_client import QdrantClient, models
        except ImportError:
            raise ValueError("this store needs: pip install 'khaosz[vectordb]'") from None
        self.models, self.name = models, name
        self.client = QdrantClient(**{"url" if "://" in where else
                                      "location" if where == ":memory:" else "path": where})
        if not self.client.collection_exists(name):
            self.client.create_collection(name, vectors_config=models.VectorParams(
                size=dim, distance=models.Distance.COSINE))
        size = self.client.get_collection(name).config.params.vectors.size
        if size != dim:
            raise ValueError(f"{name}: holds vectors of {size} numbers, not {dim}")

    def add(self, chunks: list[Chunk], vectors: np.ndarray) -> None:
        """Chunks with their vectors (n, dim). A point is known by its content: no duplicates."""
        self.client.upload_points(self.name, (self.models.PointStruct(
            id=str(uuid.uuid5(uuid.NAMESPACE_OID, chunk.id)), vector=vector.tolist(),
            payload=asdict(chunk))
            for chunk, vector in zip(chunks, vectors, strict=True)), wait=True)

    def delete(self, document: str) -> None:
        """Forget the chunks of a document."""
        of_document = self.models.FieldCondition(key="doc", match=self.models.MatchValue(
            value=document))
        self.client.delete(self.name, self.models.Filter(must=[of_document]), wait=True)

    def search(self, vector: np.ndarray, k: int) -> list[tuple[Chunk, float]]:
        """The k chunks nearest to a vector (dim,), with their cosines."""
        found = self.client.query_points(self.name, query=vector.tolist(), limit=k).points
        return [(Chunk(**point.payload), point.score) for point in found]
