"""One image over two network namespaces, as over two hosts, and what happens when the link between them is cut."""
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import two_hosts

NAMES = ('ls_vision_a', 'ls_vision_b')
LINKS = ('ls_a', 'ls_b')


def ip(*words):
    subprocess.run(['ip', *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts():
    """Two namespaces with 10.77.0.1 and 10.77.0.2, joined by a cable."""
    try:
        ip('link', 'add', LINKS[0], 'type', 'veth', 'peer', 'name', LINKS[1])
        for i, (name, link) in enumerate(zip(NAMES, LINKS), 1):
            ip('netns', 'add', name)
            ip('link', 'set', link, 'netns', name)
            ip('-n', name, 'addr', 'add', f'10.77.0.{i}/24', 'dev', link)
            ip('-n', name, 'link', 'set', link, 'up')
            ip('-n', name, 'link', 'set', 'lo', 'up')
        yield
    finally:
        for name in NAMES:
            subprocess.run(['ip', 'netns', 'delete', name], capture_output=True)
        subprocess.run(['ip', 'link', 'delete', LINKS[0]], capture_output=True)


def launch(i, folder):
    command = [
        'ip', 'netns', 'exec', NAMES[i], sys.executable, '-m', 'torch.distributed.run', '--nnodes', '2',
        '--nproc_per_node', '1', '--rdzv_backend', 'c10d', '--rdzv_endpoint', '10.77.0.1:29400', '--rdzv_id', 'test',
        '--rdzv_conf', f'is_host={1 - i}', '--local_addr', f'10.77.0.{i + 1}', two_hosts.__file__, str(folder)]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=open(folder / f'log {i}', 'w'),
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'GLOO_SOCKET_IFNAME': LINKS[i],
             'PYTHONPATH': os.pathsep.join(filter(None, sys.path))})


def wait_for(condition, seconds):
    stop = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < stop, f'not within {seconds} seconds'
        time.sleep(.1)


def end_all():
    for name in NAMES:
        found = subprocess.run(['ip', 'netns', 'pids', name], capture_output=True, text=True).stdout
        for pid in map(int, found.split()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.skipif(not (sys.platform == 'linux' and os.geteuid() == 0 and shutil.which('ip')),
                    reason='network namespaces need root and iproute2')
def test_exact_over_a_link_until_it_is_cut(hosts, tmp_path):
    processes = [launch(i, tmp_path) for i in (0, 1)]
    try:
        wait_for(lambda: all((tmp_path / f'step {rank}').exists() for rank in (0, 1)), 120)
        assert [(tmp_path / f'wrong {rank}').read_text() for rank in (0, 1)] == ['{}', '{}']
        ip('-n', NAMES[0], 'link', 'set', LINKS[0], 'down')
        cut = time.monotonic()
        wait_for(lambda: all((tmp_path / f'end {rank}').exists() for rank in (0, 1)), 60)
        print(f'both ended {time.monotonic() - cut:.0f} s after the cut')
    finally:
        end_all()
        for process in processes:
            process.wait()
    texts = [(tmp_path / f'end {rank}').read_text() for rank in (0, 1)]
    print(texts)
    # one of the two is on the host of the store
    blames = ("died or can't be reached", 'the link to its host, or that host, is gone')
    assert sorted(blame in text for text in texts for blame in blames) == [False, False, True, True]
