"""Requests of many clients at once: they join and leave between tokens, and share each step of the model.

``work`` is what is asked and what comes of it; ``engine`` runs it on one thread; ``web`` speaks OpenAI's protocol.
"""
