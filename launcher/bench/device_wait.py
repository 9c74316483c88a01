"""A wait inside a compiled program, on the thread of a CPU device, that Python has no part in.

It is a custom call to the C library's `nanosleep`, by XLA's old interface, which hands a function the
address of its result first: XLA announces its removal on standard error. The result begins as the operand,
a `timespec`. A Python function would not do: whoever sleeps in one asks for the interpreter's lock when it
wakes, which the thread that dispatches the program's other instructions holds for milliseconds at a time;
and `jax.pure_callback` brings its arguments to the first CPU device, behind whatever that one is busy with.
"""

import ctypes
import functools

import jax
import jax.numpy as jnp

_TARGET = "launcher_nanosleep"


def wait_on_device(token: jax.Array, wait_s: float) -> jax.Array:
    """Give back the token, an int32 zero, after a while of less than a second."""
    _register()
    timespec = jnp.array([0, 0, round(wait_s * 1e9), 0], jnp.int32) + token  # two 64-bit integers
    like = jax.ShapeDtypeStruct(timespec.shape, timespec.dtype)
    sleep = jax.ffi.ffi_call(
        _TARGET, like, custom_call_api_version=1, input_output_aliases={0: 0}, has_side_effect=True
    )
    return sleep(timespec)[0]


@functools.cache
def _register() -> None:
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype = ctypes.py_object
    new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    address = ctypes.cast(ctypes.CDLL(None).nanosleep, ctypes.c_void_p)
    capsule = new_capsule(address, b"xla._CUSTOM_CALL_TARGET", None)
    jax.ffi.register_ffi_target(_TARGET, capsule, platform="cpu", api_version=0)
