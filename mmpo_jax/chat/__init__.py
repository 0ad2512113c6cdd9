"""A client of servers with the OpenAI chat-completions protocol: vLLM, SGLang, commercial ones."""
