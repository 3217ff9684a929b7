"""What a run leaves on the disk: pictures, parameters, and the camera files of the programs that read them."""

from gafext.output.formats import FORMATS, choose_formats
from gafext.output.output import VIEW_FILES, MultiViewOutput, contact_sheet, write_views

__all__ = ["FORMATS", "VIEW_FILES", "MultiViewOutput", "choose_formats", "contact_sheet", "write_views"]
