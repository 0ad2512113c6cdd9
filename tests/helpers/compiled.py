"""Compiled programs that tests share: those of one device on the disk, others in the process."""

from jax._src import compilation_cache

SEVERAL = "several-devices-"
programs = {}
"""Of several devices, by the cache's key."""


def share():
    """Puts JAX's compilation cache to use for programs of several CPU devices as well, in memory.

    Read from the disk they have lost the order of their collectives, and can wait for each other
    for ever; the very program that was compiled has not.
    """
    make_key = compilation_cache.get_cache_key
    read = compilation_cache.get_executable_and_time
    write = compilation_cache.put_executable_and_time

    def key_of(module, devices, *arguments, **options):
        key = make_key(module, devices, *arguments, **options)
        return key if devices.size == 1 else SEVERAL + key

    def read_program(key, *arguments, **options):
        if not key.startswith(SEVERAL):
            return read(key, *arguments, **options)
        return (programs[key], 0) if key in programs else (None, None)

    def write_program(key, name, program, *arguments, **options):
        if not key.startswith(SEVERAL):
            return write(key, name, program, *arguments, **options)
        programs[key] = program

    compilation_cache.get_cache_key = key_of
    compilation_cache.get_executable_and_time = read_program
    compilation_cache.put_executable_and_time = write_program
