"""OpenAI's protocol, over an engine.

``fields`` is what clients may send, and ``jobs`` what an engine is asked for it. ``hearing`` brings the engine's events
to asyncio, ``choices`` makes texts of them, without their stops, and ``answers`` OpenAI's objects of these. ``app`` has
the endpoints; every request comes to them through ``front`` (ids, ``keys``, limits, ``metrics``, logs). ``refusals`` is
how anything is refused, and ``server`` runs it all until it is told to stop.
"""
