"""A small world of captioned pictures and clips, on which `tiny-scenes` is trained and measured."""
