"""bayes-dispatch: a language model that adapts itself to each prompt, and knows how sure it is about it.

The public names are those of ``__init__.pyi``. They are loaded when they are first used (PEP 562), so that
``import bayes_dispatch`` stays light.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
