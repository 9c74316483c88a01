"""`mode=profile`: what the devices at hand can do, measured."""
