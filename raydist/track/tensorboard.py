"""A run's event files. Each driver writes them again from the first record: none is lost, none is doubled."""

from __future__ import annotations

from raydist.folder import RunFolder
from raydist.track.records import Record, figures


class TensorBoard:
    """An attempt that begins at step s takes back the points after s of earlier ones."""

    def __init__(self, run: RunFolder) -> None:
        from tensorboardX.event_file_writer import EventsWriter  # writes at once, where SummaryWriter queues

        self.offset, folder = 0, run.tensorboard
        folder.mkdir(exist_ok=True)
        for old in folder.glob("events.out.tfevents.*"):
            old.write_bytes(b"")  # a TensorBoard that reads it would wait for ever at one that is gone
        self._writer = EventsWriter(str(folder / "events"))

    def send(self, records: list[Record], offset: int) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        for record in records:
            if record["kind"] in ("start", "resume"):
                self._purge(record["step"] + (record["kind"] == "resume"))
            values = [Summary.Value(tag=name, simple_value=v) for name, v in figures(record).items()]
            if values:
                summary = Summary(value=values)
                self._writer.write_event(
                    Event(wall_time=record.get("time", 0), step=record["step"], summary=summary)
                )
        self._writer.flush()
        self.offset = offset

    def close(self, state: str) -> None:
        self._writer.close()

    def _purge(self, step: int) -> None:
        """As SummaryWriter(purge_step=...): points at `step` and after it, so far, vanish."""
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._writer.write_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
