import os
import subprocess
import sys
import threading

from flash.log_filters import is_noise, quiet


def test_only_known_lines_are_dropped():
    code = (
        "import os\n"
        "from flash.log_filters import quiet\n"
        "with quiet():\n"
        "    os.write(2, b'[cpuinfo_utils.cpp:71] Reading file\\nreal trouble\\n')\n"
        "    with quiet():\n"
        "        os.write(2, b'[kernel_runtime_context.h:91] No temp allocator provided\\n')\n"
        "os.write(2, b'after\\n')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stderr.splitlines() == ["real trouble", "after"]


def test_two_threads_are_quiet_at_once():
    inside, done = threading.Event(), threading.Event()

    def wait():
        with quiet():
            inside.set()
            done.wait(10)

    before = os.fstat(2)
    thread = threading.Thread(target=wait)
    thread.start()
    assert inside.wait(10)
    with quiet():
        pass  # waits for the other thread if that holds a lock
    assert not os.path.samestat(os.fstat(2), before)
    done.set()
    thread.join()
    assert os.path.samestat(os.fstat(2), before)


def test_descriptor_is_restored_after_an_error():
    before = os.fstat(2)
    try:
        with quiet():
            raise KeyError
    except KeyError:
        pass
    assert os.path.samestat(os.fstat(2), before)
    assert not is_noise("error: no such operator llama::custom_sdpa")
