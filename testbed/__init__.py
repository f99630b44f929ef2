"""The live side of ersim: real vLLM experts, the real gateway, the load on them, and what was recorded.

vLLM is imported only by modules that run inside the server's process (`recording_scheduler`) or
that exist to compare with it (`oracle`); everything else works where vLLM is not installed.
"""
