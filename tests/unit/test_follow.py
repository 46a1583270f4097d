"""The sidecar's logs as a person wants them."""

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from vmmesh_agent.follow import Line, Logs, Story, painted
from vmmesh_agent.host import Host
from vmmesh_agent.records import Stream

START = datetime(2026, 3, 4, 20, 15, 0, tzinfo=UTC)
FILES = (Stream.LOG, Stream.ERR)  # the journal is a machine's: tests/system


def at(seconds: float) -> str:
    """The time that so many seconds after the start has in a log."""
    return (START + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def agent(seconds: float, level: str, message: str, scope: str = "") -> str:
    return "\t".join([at(seconds), level, *([scope] if scope else []), message]) + "\n"


def request(seconds: float, status: int = 200) -> str:
    time = at(seconds)[:23] + "Z"
    return f'[{time}] "GET /orders?x=1 HTTP/1.1" {status} - via_upstream - "-" 0 12 3 2 "-" "curl/8" "id" "orders:80"\n'


BEGIN = agent(0, "info", 'FLAG: --concurrency="2"') + agent(0.1, "info", "Version 1.28.2-abc-Clean")
REFUSED = "failed to warm certificate: rpc error: code = Unauthenticated desc = authentication failure"
SIGNED = (
    agent(300, "info", "connected to delta upstream XDS server: istiod.istio-system.svc:15012\tid=7", "xdsproxy")
    + agent(300.2, "info", "generated new workload certificate\tlatency=12ms ttl=23h59m59s", "cache")
    + agent(300.4, "info", "returned workload certificate from cache\tttl=23h59m59s", "cache")
)


class Machine:
    """A tree with the sidecar's logs."""

    def __init__(self, tree: Path) -> None:
        self.folder = tree / "var/log/istio"
        self.folder.mkdir(parents=True)
        self.host = Host(tree)

    def append(self, text: str | bytes, name: str = "istio.log") -> None:
        with (self.folder / name).open("ab") as file:
            file.write(text if isinstance(text, bytes) else text.encode())


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def told(machine: Machine, now: float = 600, streams: tuple[Stream, ...] = FILES) -> list[str]:
    """What `logs` shows of what is there."""
    moment = START + timedelta(seconds=now)
    logs, story = Logs(machine.host, streams), Story()
    lines = [line.text for line in (*story.tell(logs.read(moment)), *story.end(moment))]
    logs.close()
    return lines


def matching(lines: list[str], pattern: str) -> list[int]:
    return [number for number, line in enumerate(lines) if re.search(pattern, line)]


def test_a_failure_is_explained_once_below_its_line_and_its_end_is_said(machine: Machine) -> None:
    machine.append(BEGIN + "".join(agent(70 + n, "warn", REFUSED, "sds") for n in range(5)) + SIGNED)
    lines = told(machine)
    (shown,) = matching(lines, "authentication failure")
    (explained,) = matching(lines, "↳ token_rejected: ")
    assert explained == shown + 1
    assert matching(lines, "to do: ") == [number for number in matching(lines, "to do: ") if number > shown]
    (recovered,) = matching(lines, "↳ recovered: token_rejected, after ")
    assert recovered > explained


def test_what_is_said_again_is_counted_and_said_again_when_it_lasts(machine: Machine) -> None:
    machine.append(BEGIN + "".join(agent(70 + n, "warn", REFUSED, "sds") for n in range(1000)))
    lines = told(machine, now=1100)
    assert len(matching(lines, "warn .*authentication failure")) == 2
    assert sum(int(count) for line in lines for count in re.findall(r"(\d+) lines like those above", line)) == 998
    assert len(matching(lines, "↳ token_rejected")) == 1


def test_the_access_log_is_a_counter_between_the_lines_that_matter(machine: Machine) -> None:
    machine.append(BEGIN + SIGNED)
    machine.append("".join(request(310 + n, 503 if n < 3 else 200) for n in range(50)))
    machine.append(agent(400, "warn", "something new and loud"))
    machine.append(request(401))
    lines = told(machine)
    (first,) = matching(lines, "… 50 requests, 3 answered with 5xx")
    (warned,) = matching(lines, "something new and loud")
    (second,) = matching(lines, "… 1 request, none answered with 5xx")
    assert first < warned < second
    assert not matching(lines, "GET")


def test_the_access_log_in_json_is_counted_too(machine: Machine) -> None:
    line = '{"bytes_sent":1,"path":"/","response_code":%d,"start_time":"2026-03-04T20:20:00.000Z"}\n'
    machine.append(line % 200 + line % 503 + line % 99)
    assert matching(told(machine), "… 3 requests, 1 answered with 5xx")


def test_a_request_whose_line_comes_in_two_pieces_is_counted_once(machine: Machine, following: "Following") -> None:
    line = request(1)
    machine.append(line[:30])
    machine.append(line[30:60])
    before = following.look(1)
    machine.append(line[60:])
    counted = re.findall(r"… (\d+) request", "".join([*before, *following.look(2), *following.look(100)]))
    assert counted == ["1"]


def test_the_streams_are_merged_by_time(machine: Machine) -> None:
    machine.append(agent(10, "warn", "first") + agent(30, "warn", "third"))
    machine.append(
        agent(20, "warning", "envoy main\tsecond") + agent(40, "error", "envoy main\tfourth"), "istio.err.log"
    )
    lines = told(machine)
    order = [word for line in lines for word in ("first", "second", "third", "fourth") if line.endswith(word)]
    assert order == ["first", "second", "third", "fourth"]


def test_one_stream_alone_can_be_asked_for(machine: Machine) -> None:
    machine.append(agent(10, "warn", "of the agent"))
    machine.append(agent(20, "warning", "envoy main\tof Envoy"), "istio.err.log")
    assert not matching(told(machine, streams=(Stream.ERR,)), "of the agent")
    assert matching(told(machine, streams=(Stream.ERR,)), "of Envoy")


def test_what_happens_all_the_time_and_means_nothing_is_left_out(machine: Machine) -> None:
    machine.append(BEGIN + agent(1, "info", "Apply mesh config from file defaultConfig:") + "  discoveryAddress: x\n")
    lines = told(machine, now=5)
    assert matching(lines, "Version 1.28.2")
    assert not matching(lines, "FLAG|Apply mesh|discoveryAddress")


def test_the_day_is_said_when_it_changes(machine: Machine) -> None:
    machine.append(agent(0, "warn", "evening") + agent(6 * 3600, "warn", "night") + agent(7 * 3600, "warn", "later"))
    assert [line for line in told(machine, now=8 * 3600) if line.startswith("—")] == [
        "— 2026-03-04 UTC —",
        "— 2026-03-05 UTC —",
    ]


def test_hostile_bytes_do_not_reach_the_terminal(machine: Machine) -> None:
    hostile = b"a\x1b[2Jb\x07\x9b2J\rc\x00\xff\xe2\x80\xaed" + b"\xc2\x9b31m"
    machine.append(at(1).encode() + b"\twarn\t" + hostile + b"\n")
    machine.append(at(2).encode() + b"\terror\t" + hostile + b" authentication failure\n")
    machine.append(b"\x1b]0;title\x07 no head\n[" + hostile + b'] "GET" 200\n')
    lines = told(machine)
    assert lines
    assert [letter for line in lines for letter in line if not letter.isprintable()] == []


def test_a_line_without_end_is_shown_short(machine: Machine) -> None:
    machine.append(agent(1, "error", "x" * 100_000))
    assert max(map(len, told(machine))) < 1000


class Following:
    """`logs --follow`, moment by moment."""

    def __init__(self, machine: Machine) -> None:
        self._logs, self._story = Logs(machine.host, FILES), Story()

    def look(self, now: float) -> list[str]:
        moment = START + timedelta(seconds=now)
        return [line.text for line in (*self._story.tell(self._logs.read(moment)), *self._story.pause(moment))]

    def close(self) -> None:
        self._logs.close()


@pytest.fixture
def following(machine: Machine) -> Iterator[Following]:
    following = Following(machine)
    yield following
    following.close()


def test_new_lines_are_shown_through_truncation_and_rotation(machine: Machine, following: Following) -> None:
    machine.append(agent(1, "warn", "before everything"))
    assert matching(following.look(1), "before everything")
    (machine.folder / "istio.log").write_bytes(b"")  # copytruncate
    machine.append(agent(2, "warn", "after the truncation, longer than what was there before it"))
    assert matching(following.look(2), "after the truncation")
    (machine.folder / "istio.log").rename(machine.folder / "istio.log.1")
    machine.append(agent(3, "warn", "after the rotation"))
    assert matching([*following.look(3), *following.look(4)], "after the rotation")
    assert following.look(5) == []


def test_traffic_is_told_once_a_minute_while_following(machine: Machine, following: Following) -> None:
    machine.append(request(0))
    following.look(1)
    machine.append(request(60))
    before = following.look(60.5)
    machine.append(request(61) * 9)
    after = [*following.look(62), *following.look(130)]
    counted = [int(number) for line in (*before, *after) for number in re.findall(r"… (\d+) request", line)]
    assert sum(counted) >= 10
    assert len(counted) <= 2
    assert following.look(200) == []


def test_what_lasts_is_explained_although_nothing_new_is_written(machine: Machine, following: Following) -> None:
    machine.append(BEGIN)
    assert not matching(following.look(5), "↳")
    assert matching(following.look(90), "↳ not_ready_no_config")
    assert following.look(95) == []


def test_a_failure_that_a_restart_ends_is_over_only_when_the_new_run_serves(
    machine: Machine, following: Following
) -> None:
    machine.append(BEGIN + agent(70, "warn", REFUSED, "sds"))
    assert matching(following.look(71), "↳ token_rejected")
    machine.append(agent(100, "info", "FLAG: --x=1") + agent(100.1, "info", "Version 1.28.2-abc-Clean"))
    assert not matching(following.look(101), "↳")
    machine.append(SIGNED)
    assert matching(following.look(301), "↳ recovered: token_rejected")


def test_colour_says_what_a_line_is_about() -> None:
    assert painted(Line("x", "error")) == "\x1b[31mx\x1b[0m"
    assert painted(Line("x", "info")) == "x"
