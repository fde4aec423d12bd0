"""Which rank it is that another waits for in vain.

Each process of a group has a thread that looks once a second, in the process group's store, whether another has given
up waiting. Then it writes down what its own process is at. The one that has given up reads these answers: the culprit
is who wrote an error before it left, else who does not answer, else who does something else than waiting.
"""
import atexit
import json
import sys
import threading
import time
import weakref
from typing import Any, Dict, List, Optional

import torch.distributed as dist

POLL_SECONDS = 1.
ANSWER_SECONDS = 4.
_PREFIX = 'ls_vision'


class Watch:
    """What this process is at, for the others to ask."""

    def __init__(self, group: dist.ProcessGroup, global_ranks: List[int]):
        self.others = [rank for rank in global_ranks if rank != dist.get_rank()]
        self.rank = dist.get_rank()
        self.store = dist.PrefixStore(_PREFIX, group.get_group_store())
        self.waiting = ''
        """For what the process waits; empty where it does not."""
        self.calls = 0
        """Waits so far."""
        self.blamed = False
        """Whether this process has given up waiting, which makes its own end no cause."""
        self.error: Optional[BaseException] = None
        threading.Thread(target=self._answer, daemon=True, name='ls_vision rank watch').start()
        self._follow_exit()

    def culprits(self) -> str:
        """Who is to blame for a wait in vain, as a clause; asks the other processes for some seconds."""
        self.blamed = True
        found: Dict[int, Any] = {}
        # in a thread: a store that is out of reach blocks its callers
        thread = threading.Thread(target=self._ask, args=(found,), daemon=True)
        thread.start()
        thread.join(ANSWER_SECONDS + 2 * POLL_SECONDS)
        if -1 not in found:
            return (f'the process group\'s store does not answer either, so that the link to its host, or that host, '
                    f'is gone; of ranks {self.others} nothing is known')
        return describe({rank: found.get(rank) for rank in self.others}, self.calls)

    def _ask(self, found: Dict[int, Any]) -> None:
        """Fills in each rank's answer, and for -1 whether the store can be reached."""
        try:
            self._publish()
            self.store.set('asked', '1')
            found[-1] = True
            stop = time.monotonic() + ANSWER_SECONDS
            while time.monotonic() < stop and len(found) <= len(self.others):
                for rank in self.others:
                    if rank not in found and self.store.check([str(rank)]):
                        found[rank] = json.loads(self.store.get(str(rank)))
                time.sleep(.1)
        except RuntimeError:  # DistNetworkError and others: the store's host is gone
            found.pop(-1, None)

    def _answer(self) -> None:
        try:
            while not self.blamed and dist.is_initialized():
                time.sleep(POLL_SECONDS)
                if self.store.check(['asked']):
                    self._publish()
                    return
        except RuntimeError:
            return  # the store is gone, as at the end of a program

    def _publish(self) -> None:
        if self.error is not None and not self.blamed:
            state: Dict[str, Any] = dict(error=f'{type(self.error).__name__}: {self.error}'[:500])
        else:
            state = dict(waiting=self.waiting, calls=self.calls)
        self.store.set(str(self.rank), json.dumps(state))

    def _follow_exit(self) -> None:
        """Writes down the error that ends this process."""
        previous = sys.excepthook

        def hook(kind: Any, error: BaseException, traceback: Any) -> None:
            self.error = error
            previous(kind, error, traceback)

        def leave() -> None:
            if self.error is not None and not self.blamed:
                thread = threading.Thread(target=self._publish, daemon=True)
                thread.start()
                thread.join(ANSWER_SECONDS)

        sys.excepthook = hook
        atexit.register(leave)


def describe(answers: Dict[int, Any], calls: int) -> str:
    """Names the culprits.

    Args:
        answers: By global rank: None without an answer, `error`, or `waiting` and `calls`.
        calls: Waits of the process that asks, this one included.
    """
    failed = [f'rank {rank} has failed with {a["error"]}' for rank, a in answers.items() if a and 'error' in a]
    if failed:
        return '; '.join(failed)
    silent = [rank for rank, a in answers.items() if a is None]
    if silent:
        return f'{_ranks(silent)} died or can\'t be reached'
    busy = [rank for rank, a in answers.items() if not a['waiting']]
    if busy:
        return f'{_ranks(busy)} hung, or took too long, outside of any exchange'
    behind = [f'rank {rank} waits for {a["waiting"]}' for rank, a in answers.items() if a['calls'] != calls]
    return '; '.join(behind) or 'all ranks wait, and the messages between them are lost'


def _ranks(ranks: List[int]) -> str:
    return f'rank {ranks[0]}' if len(ranks) == 1 else f'ranks {", ".join(map(str, ranks))}'


_watches: 'weakref.WeakKeyDictionary[dist.ProcessGroup, Watch]' = weakref.WeakKeyDictionary()


def watch(group: dist.ProcessGroup, global_ranks: List[int]) -> Watch:
    """The one watch of a group in this process."""
    if group not in _watches:
        _watches[group] = Watch(group, global_ranks)
    return _watches[group]
