"""Asking all hosts at once: connect, look, compare clocks, see whether folders are shared, meet over the network.

Each round has its time; a host that does not answer in it is left behind, with what it has told so far.
"""

import contextlib
import dataclasses
import secrets
import selectors
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from mellow_ds.launcher.connection import Connection
from mellow_ds.launcher.plan import LaunchPlan
from mellow_ds.launcher.remote import explain
from mellow_ds.launcher.wire import Message
from mellow_ds.preflight.facts import FOLDER, HostFacts
from mellow_ds.preflight.look import SHARED

PROBE = "mellow_ds.preflight.probe"
LOOK_SECONDS = 12.0  # from the start of ssh until a host has told all; ssh itself gives up after 10
ENV_FILE_SECONDS = 15.0  # where a file is sourced first
_ROUND_SECONDS = 5.0  # of the later rounds; a connection within gives up after 3
_LATE_SECONDS = 1.5  # in later rounds, for a host that was late in one
_END_SECONDS = 2.0
_TICK_SECONDS = 0.1
_NUM_TIMES = 5  # that a clock is asked: the quickest answer counts
_MAX_NEIGHBOURS = 16  # hosts that each one connects to, besides the first


@dataclass(frozen=True)
class Clock:
    """A host's clock against the one here."""

    skew_seconds: float  # above 0: it is ahead
    uncertain_seconds: float  # half of the round trip


@dataclass(frozen=True)
class Reached:
    """An attempt to connect to another host."""

    to: str
    why: str = ""  # it failed
    is_right: bool = False  # the other end said the word that was given to that host
    own: str = ""  # address that the connection begins at
    peer: str = ""  # address that it leads to


@dataclass(frozen=True)
class HostReport:
    """What came of one host."""

    name: str
    num_slots: int = 1
    problem: str = ""  # why nothing can be started there; all else is then unknown
    clock: Clock | None = None
    facts: HostFacts = field(default_factory=HostFacts)
    missing: tuple[str, ...] = ()  # subjects that it has not answered in time
    unknown: Mapping[str, str] = field(default_factory=dict)  # subject -> why it cannot tell
    shares: Mapping[str, bool] = field(default_factory=dict)  # folder -> whether it sees what the first host wrote
    port_problem: str = ""  # of the first host: why the port where the ranks meet cannot be used
    meeting: Reached | None = None  # to the first host; None: not tried
    neighbours: tuple[Reached, ...] = ()


@dataclass(frozen=True)
class Survey:
    """What came of all."""

    hosts: tuple[HostReport, ...]
    folders: tuple[str, ...] = ()  # that all hosts are to share
    shards: tuple[str, ...] = ()  # folders that all read
    marker: str = ""  # the host that wrote into the shared ones
    mark_problems: Mapping[str, str] = field(default_factory=dict)  # folder -> why it could not
    meeting_host: str = ""  # that the others connected to: the first that can be used

    @property
    def reached(self) -> tuple[HostReport, ...]:
        """Hosts that have answered."""
        return tuple(host for host in self.hosts if not host.problem)


class _Visit:
    """One host while it is asked."""

    def __init__(self, connection: Connection, num_slots: int) -> None:
        self.connection = connection
        self.num_slots = num_slots
        self.was_late = False  # in a round: it does not hold up the next ones as well
        self.problem = ""
        self.facts = HostFacts()
        self.times: list[Clock] = []
        self.asked_at = 0.0
        self.awaited: set[str] | None = None  # subjects; None: it has not said which it has
        self.unknown: dict[str, str] = {}
        self.answers: dict[str, dict[str, Message]] = {"marked": {}, "found": {}, "reached": {}}
        self.listening: Message | None = None

    @property
    def name(self) -> str:
        return self.connection.host.name

    @property
    def is_usable(self) -> bool:
        return not self.problem and self.connection.state == "ready"

    @property
    def has_told(self) -> bool:
        return self.awaited is not None and not self.awaited

    def lose(self, why: str) -> None:
        if not self.problem:
            self.problem = why
        self.connection.state = "lost"


class Surveyor:
    """Asks the hosts of a plan."""

    def __init__(
        self,
        plan: LaunchPlan,
        commands: Mapping[str, Sequence[str]],
        folders: Sequence[str],
        shards: Sequence[str] = (),
    ) -> None:
        """`commands`: what starts each host's probe; `folders`: absolute, that all hosts are to share; `shards`: that
        all read."""
        self._plan, self._commands = plan, commands
        self._folders, self._shards = tuple(folders), tuple(shards)
        self._selector = selectors.DefaultSelector()
        self._visits: list[_Visit] = []
        self._word = secrets.token_hex(8)
        self._places: dict[str, str] = {}  # shared folder -> the one that is written to
        self._first: _Visit | None = None  # that the others connect to

    def run(self) -> Survey:
        """All rounds; every probe is told to end, and hosts that hang are left."""
        try:
            for host in self._plan.hosts:
                connection = Connection(host, self._commands[host.name])
                self._visits.append(_Visit(connection, host.num_ranks))
                for descriptor in (connection.output, connection.errors):
                    self._selector.register(descriptor, selectors.EVENT_READ, self._visits[-1])
                connection.send(self._rank_place())
            self._look()
            marker, mark_problems = self._share()
            self._meet()
            hosts = tuple(self._report(visit, marker, mark_problems) for visit in self._visits)
            first = self._first.name if self._first is not None else ""
            return Survey(hosts, self._folders, self._shards, marker, mark_problems, first)
        finally:
            self._leave()

    # -- rounds -------------------------------------------------------------------------------------------------------

    def _rank_place(self) -> Message:
        """The variables that a rank gets there, as launcher/watch.py puts them."""
        plan = self._plan
        own, named = dict(plan.travelling.allowed), {**plan.travelling.named, **plan.interfaces()}
        under, over = (own, named) if plan.env_file else ({}, {**own, **named})
        return {"do": "be", "under": under, "over": over}

    def _look(self) -> None:
        seconds = ENV_FILE_SECONDS if self._plan.env_file else LOOK_SECONDS
        self._until(lambda visit: visit.has_told, self._visits, seconds)
        for visit in self._visits:
            if visit.is_usable and visit.awaited is None:
                visit.lose(f"it has stopped answering: waited {seconds:.0f} s for what it knows of itself")
            if visit.connection.state == "connecting" and not visit.problem:
                slow = "; the environment file may take longer: run it there once" if self._plan.env_file else ""
                visit.lose(
                    f"no answer within {seconds:.0f} s: its shell, or a file system that it starts from, hangs{slow}"
                )

    def _share(self) -> tuple[str, dict[str, str]]:
        """The first host writes a file into each folder, and the others look for it.

        Returns that host, and the folders that it could not write to with the reason.
        """
        marker = next((visit for visit in self._visits if visit.is_usable), None)
        if marker is None:
            return "", {}
        self._places = places = self._marked_places(marker)
        name = f".mellow-preflight-{self._word}"
        wanted = sorted(set(places.values()))
        marker.connection.send({"do": "mark", "folders": wanted, "name": name, "word": self._word})
        self._until(lambda visit: len(visit.answers["marked"]) == len(wanted), [marker], _ROUND_SECONDS)
        others = [visit for visit in self._visits if visit.is_usable and visit is not marker]
        marked = {place for place, answer in marker.answers["marked"].items() if not answer["why"]}
        for visit in others:
            visit.connection.send({"do": "find", "folders": sorted(marked), "name": name})
        self._until(lambda visit: len(visit.answers["found"]) >= len(marked), others, _ROUND_SECONDS)
        problems = {folder: "it is not there" for folder in self._folders if folder not in places}
        for folder, place in places.items():
            answer = marker.answers["marked"].get(place)
            why = f"writing there has not ended in {_ROUND_SECONDS:.0f} s" if answer is None else answer["why"]
            if why:
                problems[folder] = why
        return marker.name, problems

    def _marked_places(self, marker: _Visit) -> dict[str, str]:
        """Folder -> the nearest one that exists: itself, or what it will be made in."""
        places = {}
        for folder in self._folders:
            known = marker.facts.folder(SHARED, folder)
            if known is not None and known.there not in ("", "/"):
                places[folder] = known.there
        return places

    def _meet(self) -> None:
        """All listen; then each connects to the first host where the ranks meet, and to others at any port."""
        usable = [visit for visit in self._visits if visit.is_usable]
        self._first = first = usable[0] if usable else None
        for visit in usable:
            port = self._plan.master_port if visit is first else 0
            visit.connection.send({"do": "listen", "port": port, "word": self._host_word(visit)})
        self._until(lambda visit: visit.listening is not None, usable, _ROUND_SECONDS)
        if first is None or first.listening is None:
            return
        is_master = first is self._visits[0]
        address = self._plan.master_address if is_master else first.name
        target = {"name": "", "address": address, "port": first.listening["meeting"]}
        others = [visit for visit in usable if visit is not first]
        for visit in others:
            visit.connection.send({"do": "reach", "targets": [target]})
        self._until(lambda visit: "" in visit.answers["reached"], others, _ROUND_SECONDS)
        self._meet_neighbours([visit for visit in others if visit.answers["reached"].get("", {}).get("own")], first)

    def _meet_neighbours(self, others: Sequence[_Visit], first: _Visit) -> None:
        """Ranks of all hosts connect to one another, at ports of the system's choice that a firewall may not know."""
        addresses = {visit.name: visit.answers["reached"][""]["own"] for visit in others}
        if others:
            addresses[first.name] = others[0].answers["reached"][""]["peer"]
        ring = [first, *others] if others else []
        wanted = {}
        for place, visit in enumerate(ring):
            targets = [ring[(place + step) % len(ring)] for step in range(1, min(len(ring), _MAX_NEIGHBOURS + 1))]
            listening = [(one, one.listening["any"]) for one in targets if one.listening is not None]
            wanted[visit.name] = {one.name for one, _ in listening}
            ways = [{"name": one.name, "address": addresses[one.name], "port": port} for one, port in listening]
            visit.connection.send({"do": "reach", "targets": ways})
        self._until(lambda visit: wanted[visit.name] <= visit.answers["reached"].keys(), ring, _ROUND_SECONDS)

    def _host_word(self, visit: _Visit) -> str:
        return f"{self._word} {visit.name}"[:60]

    def _leave(self) -> None:
        for visit in self._visits:
            if visit.connection.state == "ready":
                visit.connection.send({"do": "end"})
        ending = [visit for visit in self._visits if visit.connection.state == "ready"]
        self._until(lambda visit: visit.connection.state == "done", ending, _END_SECONDS)
        for visit in self._visits:
            visit.connection.close()
        self._selector.close()

    # -- what comes ---------------------------------------------------------------------------------------------------

    def _until(self, has_ended: Callable[[_Visit], bool], visits: Iterable[_Visit], seconds: float) -> None:
        """Take what comes until it has ended for all `visits`, the lost ones aside, or the time is over."""
        began = time.monotonic()
        waiting = list(visits)
        while waiting := [one for one in waiting if one.connection.state != "lost" and not has_ended(one)]:
            passed = time.monotonic() - began
            late = [one for one in waiting if passed > (min(seconds, _LATE_SECONDS) if one.was_late else seconds)]
            for visit in late:
                visit.was_late = True
                waiting.remove(visit)
            for key, _ in self._selector.select(_TICK_SECONDS if waiting else 0):
                for item in key.data.connection.read(key.fd):
                    self._take(key.data, key.fd, item)

    def _take(self, visit: _Visit, descriptor: int, item: Message | str | None) -> None:
        if item is None:
            self._selector.unregister(descriptor)
            if descriptor == visit.connection.output and not visit.connection.is_over:
                self._note_end(visit)
        elif isinstance(item, dict):
            with contextlib.suppress(KeyError, TypeError, ValueError):  # a probe of another commit
                self._heed(visit, item)

    def _note_end(self, visit: _Visit) -> None:
        code = visit.connection.exit_code()
        if visit.connection.errors in self._selector.get_map():  # its last words may still stand there
            list(visit.connection.read(visit.connection.errors))
        said = list(visit.connection.last_lines)
        if any("No module named" in line and "mellow_ds" in line for line in said):
            visit.lose("the clone there is of another commit, without what this needs: bring it to the one here")
        else:
            visit.lose(explain(said, code))

    def _heed(self, visit: _Visit, message: Message) -> None:
        what = message["is"]
        if what == "hello":
            visit.connection.state = "ready"
            self._ask_time(visit)
        elif what == "time":
            now = time.time()
            half = (now - visit.asked_at) / 2
            visit.times.append(Clock(float(message["at"]) - visit.asked_at - half, half))
            if len(visit.times) < _NUM_TIMES:
                self._ask_time(visit)
            else:
                visit.connection.send(
                    {"do": "look", "folder": self._plan.folder, "folders": self._folders, "shards": self._shards}
                )
        elif what == "looking":
            visit.awaited = set(message["at"])
        elif what in ("fact", "unknown") and visit.awaited is not None:
            visit.awaited.discard(message["of"])
            if what == "unknown":
                visit.unknown[message["of"]] = message["why"]
            else:
                visit.facts = visit.facts.with_subject(message["of"].split()[0], message["value"])
        elif what == "listening":
            visit.listening = message
        elif what in visit.answers:
            visit.answers[what][message["name" if what == "reached" else "folder"]] = message
        elif what == "done":
            visit.connection.state = "done"

    def _ask_time(self, visit: _Visit) -> None:
        visit.asked_at = time.time()
        visit.connection.send({"do": "time"})

    # -- what came of it ----------------------------------------------------------------------------------------------

    def _report(self, visit: _Visit, marker: str, mark_problems: Mapping[str, str]) -> HostReport:
        report = HostReport(visit.name, visit.num_slots, visit.problem)
        if visit.problem:
            return report
        marked = [folder for folder in self._folders if folder not in mark_problems]
        shares = dict.fromkeys(marked, True) if visit.name == marker else self._seen(visit, marked)
        unseen = [f"{FOLDER} {SHARED} {folder}" for folder in marked if folder not in shares]
        listening = visit.listening or {"why": ""}
        reached = {name: self._reached(visit, name) for name in visit.answers["reached"]}
        meeting = reached.pop("", None)
        if meeting is None and self._first is not None and visit is not self._first:
            meeting = Reached(self._first.name, "it does not answer itself")
        return dataclasses.replace(
            report,
            clock=min(visit.times, key=lambda one: one.uncertain_seconds, default=None),
            facts=visit.facts,
            missing=tuple(sorted({*(visit.awaited or ()), *unseen})),
            unknown=visit.unknown,
            shares=shares,
            port_problem=listening["why"],
            meeting=meeting,
            neighbours=tuple(reached.values()),
        )

    def _seen(self, visit: _Visit, folders: Sequence[str]) -> dict[str, bool]:
        """Whether a host sees what was written into each folder; those that it does not answer for are absent."""
        found = {folder: visit.answers["found"].get(self._places[folder]) for folder in folders}
        return {folder: answer["word"] == self._word for folder, answer in found.items() if answer is not None}

    def _reached(self, visit: _Visit, name: str) -> Reached:
        answer = visit.answers["reached"][name]
        to = self._first if not name else next(one for one in self._visits if one.name == name)
        assert to is not None, "nobody connects before there is a first"
        is_right = answer["word"] == self._host_word(to)
        return Reached(to.name, answer["why"], is_right, answer["own"], answer["peer"])
