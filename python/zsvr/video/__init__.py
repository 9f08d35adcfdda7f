"""Videos and folders of pictures, read to and written from float frames in [0, 1]."""

from zsvr.video.colour import PICTURES
from zsvr.video.reading import Frame, Sound, TruncatedVideoError, Video, VideoInfo, probe, read, stream
from zsvr.video.writing import check_target, encodings, write, write_pictures

__all__ = [
    "PICTURES",
    "Frame",
    "Sound",
    "TruncatedVideoError",
    "Video",
    "VideoInfo",
    "check_target",
    "encodings",
    "probe",
    "read",
    "stream",
    "write",
    "write_pictures",
]
