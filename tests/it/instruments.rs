//! The instruments themselves: what the other tests rest on when they say "reset" or "short".

use crate::harness::content::sha256;
use crate::harness::{Client, Content, End, Reply, Upstream};

fn ending(up: &Upstream, path: &str) -> (End, usize) {
    let mut client = Client::connect(up.address());
    client.request("GET", path, &[]);
    let answer = client.response("GET");
    (answer.end, answer.body.len())
}

#[test]
fn the_client_tells_how_a_body_ended() {
    let up = Upstream::start();
    let head = "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345";
    let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n12345\r\n";
    up.on("/whole", move |x| x.send(&format!("{head}67890")));
    up.on("/short", move |x| x.send(head));
    up.on("/reset", move |x| {
        x.send(head)?;
        std::thread::sleep(crate::harness::QUIET);
        x.reset()
    });
    up.on("/chunks", move |x| x.send(&format!("{chunked}0\r\nX: y\r\n\r\n")));
    up.on("/no-last-chunk", move |x| x.send(chunked));
    assert_eq!(ending(&up, "/whole"), (End::Complete, 10));
    assert_eq!(ending(&up, "/short"), (End::Short, 5));
    assert_eq!(ending(&up, "/reset"), (End::Reset, 5));
    assert_eq!(ending(&up, "/chunks"), (End::Complete, 5));
    assert_eq!(ending(&up, "/no-last-chunk"), (End::Short, 5));
    assert_eq!((up.count("/whole"), up.total()), (1, 5));
}

#[test]
fn content_is_the_same_however_it_is_read() {
    let content = Content::new(7, (3 << 20) + 12_345);
    let bytes = content.bytes();
    assert_eq!(bytes.len() as u64, content.len());
    assert_eq!(sha256(&bytes), content.sha256());
    let (start, end) = (1_000_000, 2_500_000);
    let mut part = Vec::new();
    let _ = content.each(start, end, |piece| {
        part.extend_from_slice(piece);
        Ok::<(), ()>(())
    });
    assert!(part == bytes[start as usize..end as usize]);
    assert_ne!(Content::new(8, 100).bytes(), Content::new(9, 100).bytes());
    assert!(bytes[..1 << 20] != bytes[1 << 20..2 << 20], "blocks differ");
}

#[test]
fn a_reply_honours_ranges_and_if_range() {
    let up = Upstream::start();
    let content = Content::new(10, 1_000);
    up.serve("/r", Reply::ok(&content).field("ETag", "\"a\""));
    for (condition, status, length) in [("\"a\"", 206, 900), ("\"b\"", 200, 1_000)] {
        let mut client = Client::connect(up.address());
        client.request("GET", "/r", &[("Range", "bytes=100-"), ("If-Range", condition)]);
        let answer = client.response("GET");
        assert_eq!((answer.status, answer.body.len()), (status, length));
        assert!(answer.body == content.bytes()[1_000 - length..]);
    }
    up.stop();
    assert!(std::net::TcpStream::connect(up.address()).is_err(), "a stopped upstream refuses");
}
