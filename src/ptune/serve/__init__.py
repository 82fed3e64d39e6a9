"""`ptune serve`: OpenAI's interface over an engine of our own, or in front of servers that run elsewhere.

Needs the extra packages of ``ptune[serve]``.
"""
