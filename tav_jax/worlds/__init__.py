"""Small worlds of captioned images and clips: base models are trained and measured on them."""
