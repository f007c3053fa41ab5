"""A page in the browser to tune on a clip and to edit it."""
