"""From files to batches: schemas, preparation, the prepared folder and its reader."""
