"""
Offers the documents to assistants that speak the Model Context Protocol, over stdin and stdout. It
needs the extra `mcp`, the official SDK: pip install mcp
"""
from collections.abc import Callable


def serve(search: Callable[[str, int], list[dict]], answer: Callable[[str], dict]) -> None:
    """Two tools until stdin ends. Raises ValueError without the SDK."""
    try:
        from mcp.server.mcpserver import MCPServer
    except ImportError:
        raise ValueError("rag.py mcp needs the extra `mcp`: pip install mcp") from None
    server = MCPServer("khaosz", instructions="The user's own documents, in English and Chinese.")

    @server.tool(name="search")
    def search_documents(question: str, most: int = 5) -> list[dict]:
        """Passages of the user's documents that bear on a question, the best first, with the place
        where each stands."""
        return search(question, max(1, min(most, 50)))

    @server.tool(name="answer")
    def answer_question(question: str) -> dict:
        """An answer from the user's documents with its sources, or that they do not hold it."""
        return answer(question)

    server.run()
