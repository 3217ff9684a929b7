"""Errors caused by user input: ValueErrors, and an OSError for output; each message says what was expected and got."""


class CheckpointError(ValueError):
    """A checkpoint file is damaged, or does not fit the network or its configuration."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """A file or folder of a checkpoint does not exist."""


class ImageError(ValueError):
    """An input image cannot be read or has no usable shape, type or range."""


class CameraError(ValueError):
    """A camera is not a rigid world-to-camera transform."""


class MeshError(ValueError):
    """A mesh cannot be read, has no triangles, or its pose is not a rotation, translation and scale."""


class OutputError(OSError):
    """A result cannot be written; no part of it was written."""
