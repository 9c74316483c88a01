"""One step on the devices of this process: state, messages, instruction by instruction or as one program."""
