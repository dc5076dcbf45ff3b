"""Day after day: windows, pins, the lease, quarantine, notices."""
