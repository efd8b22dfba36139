"""OpenAI's interfaces in our words: what a body asks for, and what is answered, for the server and for batch files.

Source: field names and shapes are those of OpenAI's published API reference; fields beyond it are vLLM's.
"""
