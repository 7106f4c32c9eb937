import threading

import pytest

from cmcr_hf import cpu


def test_threads_say_nothing_of_their_own_when_their_start_is_interrupted(monkeypatch, caplog):
    class Interrupted(threading.Barrier):
        def wait(self, timeout=None):
            if threading.current_thread() is threading.main_thread():
                self.abort()
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setattr(cpu, "Barrier", Interrupted)
    with pytest.raises(KeyboardInterrupt), cpu.pool(2):
        pass
    assert not caplog.records
