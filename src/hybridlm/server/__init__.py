"""The HTTP server: OpenAI's, Ollama's and Anthropic's APIs and a chat page, over the engine's one scheduler.

`openai.py`, `ollama.py` and `anthropic.py` translate to one internal request, `Ask`, and back; `answer.py` runs it;
`models.py` holds the models; `app.py` puts it together. Nothing here knows mathematics or memory layouts.
"""
