"""Networks whose published weights stay as they are."""
