"""A wait inside a compiled program, on the thread of a CPU device.

`jax.pure_callback` would not do: it brings its arguments to the first CPU device, behind whatever that one
is busy with. This is a custom call to a function that sleeps, by XLA's old interface, which takes a plain
function pointer; XLA announces its removal on standard error.
"""

import ctypes
import functools
import time

import jax

_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p))
_kept_alive: list = []  # XLA has only their addresses


def wait_on_device(token: jax.Array, wait_s: float) -> jax.Array:
    """Give back the token, a scalar of float32, after a while."""
    like = jax.ShapeDtypeStruct((), token.dtype)
    call = jax.ffi.ffi_call(_target(wait_s), like, custom_call_api_version=1)
    return call(token)


@functools.cache
def _target(wait_s: float) -> str:
    """Register the function that waits so long; returns its name."""

    def wait(result: int, arguments) -> None:
        time.sleep(wait_s)
        ctypes.memmove(result, arguments[0], 4)

    function = _FUNCTION(wait)
    _kept_alive.append(function)
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype = ctypes.py_object
    new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    capsule = new_capsule(ctypes.cast(function, ctypes.c_void_p), b"xla._CUSTOM_CALL_TARGET", None)
    name = f"launcher_wait_{round(wait_s * 1e6)}_us"
    jax.ffi.register_ffi_target(name, capsule, platform="cpu", api_version=0)
    return name
