"""What a run leaves on the disk: pictures, parameters, and the camera files of the programs that read them."""

from gafext.output.formats import FORMATS, choose_formats
from gafext.output.output import VIEW_FILES, MultiViewOutput, json_clean, write_views
from gafext.output.sheet import contact_sheet
from gafext.output.turntable import TURNTABLES, check_turntable
from gafext.output.viewer import write_viewer

__all__ = [
    "FORMATS",
    "TURNTABLES",
    "VIEW_FILES",
    "MultiViewOutput",
    "check_turntable",
    "choose_formats",
    "contact_sheet",
    "json_clean",
    "write_viewer",
    "write_views",
]
