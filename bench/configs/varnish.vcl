# Everything from the one backend; what the origin calls cacheable is kept.
vcl 4.1;
backend default { .host = "127.0.0.1"; .port = "@ORIGIN@"; }
