"""Pickles written opcode by opcode."""

import pickle
import struct


def as_text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def as_name(module: str, name: str) -> bytes:
    """STACK_GLOBAL, as protocol 4 writes names; it also follows dotted names."""
    return as_text(module) + as_text(name) + b"\x93"


def as_bytes(value: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(value)) + value


def body(value: object) -> bytes:
    """Return the opcodes of a plain value, without those of start and end."""
    return pickle.dumps(value, 2)[2:-1]


def transcript(content: bytes) -> bytes:
    """Return a pickle of ``{"alpha": content}``."""
    return b"\x80\x04}" + as_text("alpha") + content + b"s."


def sequence(attributes: bytes) -> bytes:
    """Return a pickle of a DataSequence with attributes: names and values in turn."""
    return transcript(SEQUENCE + b")\x81}(" + attributes + b"ub")


def array(dtype: str, raw: bytes, shape: bytes) -> bytes:
    """Return the opcodes of an array; its shape is given as opcodes."""
    arguments = as_bytes(raw) + as_name("numpy", "dtype") + as_text(dtype) + b"\x85R" + shape + as_text("C")
    return as_name("numpy._core.numeric", "_frombuffer") + b"(" + arguments + b"tR"


SEQUENCE = as_name("ridge_utils.DataSequence", "DataSequence")
