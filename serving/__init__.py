"""What serve.py stands on: the batch of texts, requests and replies in OpenAI's form, the page."""
