# ruff: noqa: E501 - a line of a log is one line
"""Heads of lines, in every form and damage, and lines put together to records."""

from datetime import UTC, datetime

import pytest

from vmmesh_agent.records import Reader, Record, Stream, read_record

MOMENT = datetime(2025, 3, 4, 5, 6, 7, 123456, tzinfo=UTC)
TIME = "2025-03-04T05:06:07.123456Z"


def records(text: str | bytes, stream: Stream = Stream.LOG) -> list[Record]:
    reader = Reader(stream)
    return [*reader.feed(text if isinstance(text, bytes) else text.encode()), *reader.end()]


@pytest.mark.parametrize(
    ("line", "level", "scope", "message"),
    [
        (f"{TIME}\tinfo\tStarting proxy agent", "info", "", "Starting proxy agent"),
        (f"{TIME}\twarn\tca\tca request failed", "warn", "ca", "ca request failed"),
        (f"{TIME}     error   cache   resource:default failed", "error", "cache", "resource:default failed"),
        (f"{TIME} warn cache resource:default request", "warn", "cache", "resource:default request"),
        (f"{TIME}\tinfo\txdsproxy\tconnected\tid=3", "info", "xdsproxy", "connected\tid=3"),
        (f"{TIME}\tinfo\tads\tads/ads.go:12\tADS: new connection", "info", "ads", "ADS: new connection"),
        (f"{TIME}\twarning\tenvoy config\tgRPC config stream closed: 13,", "warning", "envoy config", "gRPC config stream closed: 13,"),
        (f"{TIME}\tcritical\tenvoy main external/envoy/server.cc:90\texiting\tthread=7", "critical", "envoy main", "exiting\tthread=7"),
        (f"{TIME}\twarning\tenvoy config\t[bazel-out/x/grpc_stream.h:92] closed", "warning", "envoy config", "closed"),
        (f'{{"level":"info","time":"{TIME}","scope":"ca","msg":"x","id":1}}', "info", "ca", "x\tid=1"),
        (f'{{"time":"{TIME}","level":"warning","scope":"envoy config","msg":"x"}}', "warning", "envoy config", "x"),
        (f'{{"level":"error","time":"{TIME}","msg":"cut \\"off', "error", "", 'cut "off'),
        (f"db-1 istio-proxy {TIME}\tinfo\tsds\tx", "info", "sds", "x"),
        (f"tail of an older line{TIME}\tinfo\tsds\tx", "info", "sds", "x"),
    ],
)  # fmt: skip
def test_a_head_is_read_in_each_form(line: str, level: str, scope: str, message: str) -> None:
    [record] = records(line)
    assert (record.level, record.scope, record.message, record.moment) == (level, scope, message, MOMENT)


@pytest.mark.parametrize(
    "time", ["20XX-03-04T05:06:07.123456Z", "xxxx-xx-xxTxx:xx:xx.xxxxxxZ", "2025-13-04T05:06:07Z", ""]
)
def test_a_time_that_cannot_be_believed_is_none(time: str) -> None:
    [record] = records(f"{time}\twarn\tsds\tx")
    assert (record.level, record.scope, record.message, record.moment) == ("warn", "sds", "x", None)


def test_the_oldest_envoy_head_is_read() -> None:
    [record] = records("[2025-03-04 05:06:07.123][160][critical][config] [src/x.cc:9] gone", Stream.ERR)
    assert (record.level, record.scope, record.message) == ("critical", "envoy config", "gone")
    assert record.moment == datetime(2025, 3, 4, 5, 6, 7, 123000, tzinfo=UTC)


def test_a_write_error_of_the_agent_has_go_s_time() -> None:
    [record] = records(
        "2025-03-04 05:06:07.118209312 +0000 UTC m=+9.40 log write error: write /dev/stdout: x", Stream.ERR
    )
    assert record.moment == datetime(2025, 3, 4, 5, 6, 7, tzinfo=UTC)


@pytest.mark.parametrize(
    "line",
    [
        f'[{TIME}] "GET /failed HTTP/1.1" 503 UF - "-"',
        f'[{TIME}] "- - -" 0 - - - "-" 0 0 1 -',
        f'{{"authority":"shop","start_time":"{TIME}","response_code":503}}',
        f'{{"time":"{TIME}","path":"/failed","response_code":503}}',
        'd HTTP/1.1" 503 UF upstream "-" 0 91',
    ],
)
def test_the_access_log_gives_no_records(line: str) -> None:
    assert records(line) == []


@pytest.mark.parametrize("line", [f'[{TIME}] "GET / HTTP/1.1" 200 -', f'{{"authority":"shop","start_time":"{TIME}"}}'])
def test_the_last_request_dates_the_file(line: str) -> None:
    reader = Reader(Stream.LOG)
    assert reader.traffic_moment is None
    reader.feed(f"{line}\n{TIME}\tinfo\tx\n".encode())
    assert reader.traffic_moment == MOMENT


def test_lines_without_a_head_belong_to_the_record_before_them() -> None:
    first, second = records(f"{TIME}\tinfo\tEffective config: a: b\nc:\n  d: 1\n\n{TIME}\tinfo\tnext\n")
    assert first.message == "Effective config: a: bc:  d: 1"
    assert first.line == f"{TIME}\tinfo\tEffective config: a: b"
    assert second.message == "next"


@pytest.mark.parametrize(
    "line",
    [
        "panic: runtime error: index out of range",
        "fatal error: concurrent map writes",
        "/usr/local/bin/envoy: /lib64/libc.so.6: version `GLIBC_2.28' not found (required by envoy)",
        "14 external/tcmalloc/arena.cc:56] CHECK in Alloc: FATAL ERROR",
        "terminate called after throwing an instance of 'std::bad_alloc'",
    ],
)
def test_what_a_dying_process_prints_stands_alone(line: str) -> None:
    before, alone = records(f"{TIME}\twarning\tenvoy config\tx\n{line}\n", Stream.ERR)
    assert (before.message, alone.message) == ("x", line)


def test_a_line_that_lost_its_head_is_a_record_where_none_is_open() -> None:
    assert [record.message for record in records("Envoy proxy is ready\nand more")] == [
        "Envoy proxy is ready",
        "and more",
    ]


@pytest.mark.parametrize(
    ("head", "moment"),
    [
        ("Mar 04 05:06:07 db-1 ", None),
        ("3月 04 05:06:07 db-1.local ", None),
        ("2025-03-04T05:06:07.123456+0000 db-1 ", MOMENT),
        ("2025-03-04T07:06:07.123456+02:00 db-1 ", MOMENT),
        ("", None),
    ],
)
def test_the_head_of_the_journal_is_read_in_each_form(head: str, moment: datetime | None) -> None:
    [record] = records(f"{head}istio-start.sh[812]: iptables-save", Stream.JOURNAL)
    assert (record.scope, record.message, record.moment) == ("istio-start.sh", "iptables-save", moment)


def test_a_line_of_the_agent_in_the_journal_keeps_its_own_time() -> None:
    record = read_record(f"Mar 04 01:00:00 db-1 istio-start.sh[8]: {TIME}\terror\tx failed", Stream.JOURNAL)
    assert record is not None
    assert (record.level, record.message, record.moment) == ("error", "x failed", MOMENT)


def test_a_line_of_the_journal_without_a_head_is_what_it_is() -> None:
    [record] = records("sudo: unknown user: istio-proxy", Stream.JOURNAL)
    assert record.message == "sudo: unknown user: istio-proxy"


def test_a_hole_of_nul_bytes_is_passed_over() -> None:
    [record] = records(b"\0" * 5000 + f"{TIME}\tinfo\tsds\tx\r\n".encode())
    assert (record.scope, record.message) == ("sds", "x")


def test_a_hole_and_a_line_without_end_are_not_kept() -> None:
    reader = Reader(Stream.LOG)
    for _ in range(100):
        assert reader.feed(b"\0" * 100_000) == []
    assert [
        record.message
        for record in [*reader.feed(f"{TIME}\tinfo\tx".encode()), *reader.feed(b"y" * 9_000_000), *reader.end()]
    ] == ["x" + "y" * (len(records(f"{TIME}\tinfo\tx" + "y" * 9_000_000)[0].message) - 1)]


def test_bytes_that_are_no_text_are_replaced() -> None:
    [record] = records(f"{TIME}\tinfo\tsds\t".encode() + b"\xff\xfe")
    assert record.message == "\ufffd\ufffd"


@pytest.mark.parametrize("size", [1, 3, 17, 90])
def test_pieces_are_put_together(size: int) -> None:
    text = f'{TIME}\tinfo\tone\n[{TIME}] "GET / HTTP/1.1" 200 -\n{TIME}\tinfo\ttwo\n'.encode()
    reader = Reader(Stream.LOG)
    read = [record for at in range(0, len(text), size) for record in reader.feed(text[at : at + size])]
    read += reader.end()
    assert [record.message for record in read] == ["one", "two"]


def test_a_record_is_not_read_without_end() -> None:
    [record] = records(f"{TIME}\tinfo\tx" + "\n  y: z" * 100_000)
    assert len(record.message) < 20_000
