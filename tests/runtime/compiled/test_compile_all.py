"""Compiling many programs: all of them, side by side, counted, and an error that is not lost."""

import threading

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from launcher.errors import ConfigError
from launcher.runtime.compiled import compilation_cache
from launcher.runtime.compiled.compile_all import compile_all


def lowered(factor: float):
    return lambda: jax.jit(lambda x: x * factor).lower(jnp.zeros(3)).compile()


def test_all_are_compiled_by_name_and_progress_is_told():
    told = []
    made = compile_all({f"times {k}": lowered(float(k)) for k in range(3)}, told.append)
    assert sorted(made.executables) == ["times 0", "times 1", "times 2"]
    assert made.executables["times 2"](jnp.ones(3)).tolist() == [2.0, 2.0, 2.0]
    assert told == ["program 1 of 3", "program 2 of 3", "program 3 of 3"]
    assert str(made).startswith("compiled 3 programs in ")


def test_the_first_error_is_raised():
    def fail():
        raise ValueError("no such program")

    with pytest.raises(ValueError, match="no such program"):
        compile_all({"good": lowered(1.0), "bad": fail}, lambda text: None)


def test_threads_compile_with_the_precision_of_the_caller():
    seen = []

    def note():
        seen.append((threading.current_thread().name, jnp.zeros(1).dtype.name))
        return lowered(1.0)()

    with jax.enable_x64(True):
        compile_all({"a": note}, lambda text: None)
    assert seen[0][1] == "float64"
    assert seen[0][0].startswith("compile")


def test_the_cache_is_found_again(tmp_path):
    options = ("cache_min_compile_time_secs", "cache_min_entry_size_bytes")
    changed = ("jax_compilation_cache_dir", *(f"jax_persistent_{name}" for name in options))
    before = {name: jax.config.values[name] for name in changed}
    try:
        assert compilation_cache.use_cache(str(tmp_path)) == tmp_path
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
        like = jax.ShapeDtypeStruct((7,), jnp.float32)
        program = {"cube": lambda: jax.jit(lambda x: x**3 + 0.125).lower(like).compile()}
        assert compile_all(program, lambda text: None).num_cached == 0
        jax.clear_caches()
        made = compile_all(program, lambda text: None)
        assert made.num_cached == 1
        assert "1 of them from the cache" in str(made)
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        reset_cache()


def test_the_cache_that_the_environment_names_stays(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "theirs"))
        assert compilation_cache.use_cache("auto") == tmp_path / "theirs"
        assert compilation_cache.use_cache(str(tmp_path / "ours")) == tmp_path / "ours"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_off_is_off():
    try:
        assert compilation_cache.use_cache("off") is None
        assert not jax.config.jax_enable_compilation_cache
    finally:
        jax.config.update("jax_enable_compilation_cache", True)


@pytest.mark.parametrize("setting", ["", "file/cache"])
def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch, setting):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ConfigError, match="is no folder that can be written") as raised:
        compilation_cache.use_cache(setting)
    assert f"(runtime.compilation_cache={setting})" in str(raised.value)
