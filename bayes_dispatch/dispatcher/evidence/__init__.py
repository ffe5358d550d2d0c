"""What the dispatcher sees of prompts: named views, their files, functions that make them, and their projection."""
