"""One line in place of what JAX's coordination service says when it ends a process.

The service ends it from a thread of C++, with a page of text and SIGABRT, and no Python of that
process has a say any more. So what C++ writes to stderr goes through a process beside it, which is
this file run as a script: it passes on everything else, and imports nothing that takes time.
"""

import os
import re
import select
import signal
import subprocess
import sys

# How long a message is held back for the one that explains it: they come at the same moment.
PATIENCE_SECONDS = 2.0

HEADER = re.compile(r"[IWEF]\d{4} [\d:.]+ +\d+ (\w+)\.\w+:\d+\] ")
HELD = ("coordination_service", "coordination_service_agent", "preemption_sync_manager")
VERDICT = "Terminating process because the JAX distributed service detected fatal errors"


def translate_last_words(num_processes: int, process_id: int, start_seconds: int) -> None:
    """Sends what C++ writes to this process' stderr through a process of this file."""
    reader, writer = os.pipe()
    arguments = [str(number) for number in (num_processes, process_id, start_seconds)]
    subprocess.Popen([sys.executable, "-I", "-S", __file__, *arguments], stdin=reader)
    os.close(reader)
    # Python itself keeps the old one, for progress bars ask whether it is a terminal.
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    os.dup2(writer, 2)
    os.close(writer)


class LastWords:
    """Takes what is written to stderr, and gives back what a user is to see of it."""

    def __init__(self, num_processes: int, process_id: int, start_seconds: int):
        self.num_processes = num_processes
        self.process_id = process_id
        self.start_seconds = start_seconds
        self.held = ""
        self.holding = False
        self.ending = False

    def hear(self, text: str) -> str:
        """Returns what of these whole lines is to be seen at once."""
        seen = ""
        for line in text.splitlines(keepends=True):
            if header := HEADER.match(line):
                self.ending = self.ending or VERDICT in line
                self.holding = self.ending or header.group(1) in HELD
            if self.holding:
                self.held += line
            else:
                seen += line
        return seen

    def release(self) -> str:
        """Returns what was held back, or its meaning if it was the last."""
        held, self.held, self.holding = self.held, "", False
        return f"error: {self.meaning(held)}\n" if self.ending else held

    def meaning(self, text: str) -> str:
        """Returns the service's last message in our words; JAX 0.10 to 0.12 have the same."""
        count = self.num_processes
        me = f"process {self.process_id} of {count}"
        if "/RegisterTask" in text:
            return (
                f"{me}: not all have come within {self.start_seconds} seconds; start every one "
                f"from 0 to {count - 1}, where it reaches process 0 at its address"
            )
        unheard = re.search(r"stopped sending heartbeats\):\n((?:\S*\d\n)+)", text)
        gone = re.findall(r"(\d+)\n", unheard.group(1)) if unheard else []
        if "send RPC to coordination service" in text or "/Heartbeat" in text:
            gone = ["0"]  # whose thread the service is
        if gone:
            cause = f"process {' and '.join(gone)} of {count} is gone"
        elif "Shutdown barrier" in text:
            cause = "others have not come to the end of the run"
        else:
            status = text.partition("absl::Status: ")[2].partition("*** Check failure")[0]
            cause = " ".join(status.split())[:300]
        return f"{me} ends, since {cause}; run the same command again, what is finished is kept"


def main() -> None:
    # Ends with the process whose words these are, and not before.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    last_words = LastWords(*(int(argument) for argument in sys.argv[1:]))
    unfinished = b""
    while True:
        waiting = unfinished or last_words.held
        ready, _, _ = select.select([0], [], [], PATIENCE_SECONDS if waiting else None)
        data = os.read(0, 1 << 16) if ready else b""
        lines, newline, unfinished = (unfinished + data).rpartition(b"\n")
        seen = last_words.hear((lines + newline).decode(errors="replace"))
        if not data:  # that was all, or all for now
            seen += last_words.release() + unfinished.decode(errors="replace")
            unfinished = b""
        os.write(2, seen.encode())
        if not data and (ready or last_words.ending):
            return


if __name__ == "__main__":
    main()
