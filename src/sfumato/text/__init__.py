"""Prompts through published text encoders, run by the `transformers` library.

`encoder` is one of them: CLIP's, T5's, or the hidden states of any language model. `joined` is several, put together as
SDXL, Stable Diffusion 3 or FLUX do. `library` is all that is known of `transformers` and of its files.
"""

from sfumato.text.encoder import Text
from sfumato.text.joined import Texts
from sfumato.text.library import (
    CLIP,
    PROJECTED,
    T5,
    config_name,
    files_of,
    in_folder,
    own_names,
    published,
    read,
    tokenizer_files,
)

__all__ = [
    "CLIP",
    "PROJECTED",
    "T5",
    "Text",
    "Texts",
    "config_name",
    "files_of",
    "in_folder",
    "own_names",
    "published",
    "read",
    "tokenizer_files",
]
