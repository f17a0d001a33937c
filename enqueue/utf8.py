"""UTF-8 alone, in place of the standard library's package `encodings`, in which every Python looks for that before all else.

`make install` puts this beside the link to the interpreter that enqueue is started through (bundle.py), as the only module found
there before those of the standard library: the whole package takes a tenth of the time of the command. It is still there for what
else is asked for: a caller's locale with other bytes, a domain with letters beyond ASCII.
"""

import codecs
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# This directory comes first; the rest is where the interpreter has its own, of whichever version it is by now.
_STANDARD = f"@BASE@/{sys.platlibdir}/python{sys.version_info[0]}.{sys.version_info[1]}"
sys.path += [_STANDARD, f"{_STANDARD}/lib-dynload"]


class _Encoder(codecs.IncrementalEncoder):
    def encode(self, text: str, final: bool = False) -> bytes:
        return codecs.utf_8_encode(text, self.errors)[0]


class _Decoder(codecs.BufferedIncrementalDecoder):
    def _buffer_decode(self, data: "Any", errors: str, final: bool) -> tuple[str, int]:
        return codecs.utf_8_decode(data, errors, final)


def _decode(data: "Any", errors: str = "strict") -> tuple[str, int]:
    return codecs.utf_8_decode(data, errors, True)


def _search(name: str) -> codecs.CodecInfo | None:
    if name in ("utf_8", "utf-8"):
        return codecs.CodecInfo(
            codecs.utf_8_encode, _decode, incrementalencoder=_Encoder, incrementaldecoder=_Decoder, name="utf-8"
        )
    # From now on the package itself is asked.
    codecs.unregister(_search)
    del sys.path[0], sys.modules["encodings"]
    import encodings

    return encodings.search_function(name)


codecs.register(_search)
