"""The routing gateway: an OpenAI-compatible HTTP server in front of the experts."""
