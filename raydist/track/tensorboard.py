"""A run's event files. Each driver rewrites them from the first record: none is lost, none is doubled."""

from __future__ import annotations

from raydist.folder import RunFolder
from raydist.track.records import Record, figures


class TensorBoard:
    """An attempt that begins at step s removes the later points of the attempts before it."""

    def __init__(self, run: RunFolder) -> None:
        from tensorboardX.event_file_writer import EventsWriter  # writes at once; SummaryWriter queues

        self.offset, folder = 0, run.tensorboard
        folder.mkdir(exist_ok=True)
        for old in folder.glob("events.out.tfevents.*"):
            old.write_bytes(b"")  # not deleted: a TensorBoard that reads a deleted file waits forever
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
        """Remove the points written so far at `step` and later, as SummaryWriter(purge_step=...) does."""
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._writer.write_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
