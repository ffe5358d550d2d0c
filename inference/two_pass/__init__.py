"""Two passes: a prompt is read (``first_pass``), dispatched (``system``), blended (``blends``), filtered and continued
(``second_pass``); ``generator`` is the door.
"""
