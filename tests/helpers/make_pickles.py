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


def forged_array(route: str, code: str, byte_order: str, raw: bytes, shape: list[int], order: str = "C") -> bytes:
    """Return the opcodes of an array, by one of NumPy's routes, whose dtype denies that it holds objects."""
    dtype = as_name("numpy", "dtype") + body((code, False, True)) + b"R"
    dtype += body((3, byte_order, None, None, None, -1, -1, 0)) + b"b"
    data = b"C" + bytes([len(raw)]) + raw
    if route == "_frombuffer":
        return as_name("numpy._core.numeric", route) + b"(" + data + dtype + body(tuple(shape)) + body(order) + b"tR"
    made = as_name("numpy._core.multiarray", route)
    if route == "scalar":
        return made + dtype + data + b"\x86R"
    made += b"(" + as_name("numpy", "ndarray") + body((0,)) + b"C\x01btR"
    return made + b"(" + body(1) + body(tuple(shape)) + dtype + b"\x89" + data + b"tb"


SEQUENCE = as_name("ridge_utils.DataSequence", "DataSequence")
