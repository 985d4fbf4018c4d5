"""The commands of `recalign`, one file each: flags, printing, and calls into the rooms below."""
