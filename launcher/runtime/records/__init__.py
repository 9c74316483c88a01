"""What a run says of itself: metrics, sinks, progress, goodput."""
