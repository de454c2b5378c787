"""UniAnimate: a reference picture and a sequence of poses to a video of that person."""
