"""A model behind the API that OpenAI's clients speak, and the page at `/`."""
