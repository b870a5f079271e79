//! Streams of a reactor against the standard library's sockets, over loopback.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use bytes::Bytes;
use tercet_reactor::{Event, Reactor, Settings, StreamId, StreamLimits, mailbox, now};

const LIMITS: StreamLimits =
    StreamLimits { send_queue_bytes_max: 1 << 20, unacknowledged_max: Duration::from_secs(10) };
const PATIENCE: Duration = Duration::from_mins(1);

fn reactor() -> Reactor {
    Reactor::new(Settings { spin: Duration::from_micros(20) }).expect("a ring")
}

fn any_port() -> SocketAddr {
    "127.0.0.1:0".parse().expect("an address")
}

/// Polls until `pick` takes an event.
fn until<T>(reactor: &mut Reactor, mut pick: impl FnMut(Event) -> Option<T>) -> T {
    let deadline = now() + PATIENCE;
    let mut events = Vec::new();
    loop {
        assert!(now() < deadline, "nothing of the kind within {PATIENCE:?}");
        reactor.poll(Some(deadline), &mut events).expect("a poll");
        for event in events.drain(..) {
            if let Some(found) = pick(event) {
                return found;
            }
        }
    }
}

/// A stream of the reactor and a blocking socket at its other end.
fn pair(reactor: &mut Reactor) -> (StreamId, TcpStream) {
    let listener = reactor.listen(any_port()).expect("a listener");
    let address = reactor.local_address(listener).expect("its address");
    let other = TcpStream::connect(address).expect("a connection");
    let socket = until(reactor, |event| match event {
        Event::Accepted { socket, .. } => Some(socket),
        _ => None,
    });
    (reactor.attach(socket, LIMITS).expect("a stream"), other)
}

fn received(reactor: &mut Reactor, wanted: usize) -> Vec<u8> {
    let mut all = Vec::new();
    until(reactor, |event| {
        if let Event::Received { bytes, .. } = event {
            all.extend_from_slice(&bytes);
        }
        (all.len() >= wanted).then_some(())
    });
    all
}

#[test]
fn bytes_arrive_in_order_both_ways() {
    let mut reactor = reactor();
    let (stream, mut other) = pair(&mut reactor);
    let data: Vec<u8> = (0..8_000_000_u32).map(|i| ((i * 31) >> 3) as u8).collect();
    let expected = data.clone();
    let writer = thread::spawn(move || {
        other.write_all(&data).expect("written");
        let mut back = vec![0; data.len()];
        other.read_exact(&mut back).expect("read back");
        assert!(back == data, "the same bytes come back");
    });
    let got = received(&mut reactor, expected.len());
    assert!(got == expected, "in order, nothing lost");
    let mut rest = Bytes::from(got);
    while !rest.is_empty() {
        let piece = rest.slice(..rest.len().min(100_000));
        if reactor.send(stream, [piece.slice(..10), piece.slice(10..)]) {
            let _ = rest.split_to(piece.len());
        } else {
            let _ = reactor.poll(Some(now() + Duration::from_millis(1)), &mut Vec::new());
        }
    }
    let mut events = Vec::new();
    while !writer.is_finished() {
        reactor.poll(Some(now() + Duration::from_millis(1)), &mut events).expect("a poll");
    }
    writer.join().expect("the other end is content");
}

#[test]
fn a_full_send_queue_takes_nothing_more() {
    let mut reactor = reactor();
    let (stream, other) = pair(&mut reactor);
    let piece = Bytes::from(vec![7; 100_000]);
    let mut taken = 0;
    for _ in 0..200 {
        taken += usize::from(reactor.send(stream, [piece.clone()]));
        reactor.poll(Some(now()), &mut Vec::new()).expect("a poll");
    }
    assert!(taken < 200, "an unread stream fills up");
    assert!(reactor.queued_bytes(stream) <= LIMITS.send_queue_bytes_max);
    drop(other);
    until(&mut reactor, |event| matches!(event, Event::Closed { .. }).then_some(()));
    assert!(!reactor.send(stream, [piece]), "a closed stream takes nothing");
}

#[test]
fn a_held_stream_receives_nothing_until_it_is_resumed() {
    let mut reactor = reactor();
    let (stream, mut other) = pair(&mut reactor);
    other.write_all(b"one").expect("written");
    assert_eq!(received(&mut reactor, 3), b"one");
    reactor.hold(stream);
    other.write_all(b"two").expect("written");
    let mut events = Vec::new();
    reactor.poll(Some(now() + Duration::from_millis(50)), &mut events).expect("a poll");
    assert!(events.is_empty(), "{events:?}");
    assert!(reactor.send(stream, [Bytes::from_static(b"answer")]), "it can send");
    reactor.tell_drained(stream);
    until(&mut reactor, |event| matches!(event, Event::Drained { .. }).then_some(()));
    reactor.resume(stream);
    assert_eq!(received(&mut reactor, 3), b"two");
    assert_eq!(StreamId::from_bits(stream.to_bits()), stream);
}

#[test]
fn finish_sends_what_is_queued_and_then_ends() {
    let mut reactor = reactor();
    let (stream, mut other) = pair(&mut reactor);
    assert!(reactor.send(stream, [Bytes::from_static(b"last words")]));
    reactor.finish(stream);
    let reader = thread::spawn(move || {
        let mut all = Vec::new();
        other.read_to_end(&mut all).expect("an orderly end, no reset");
        all
    });
    while !reader.is_finished() {
        reactor.poll(Some(now() + Duration::from_millis(1)), &mut Vec::new()).expect("a poll");
    }
    assert_eq!(reader.join().expect("read"), b"last words");
}

#[test]
fn a_connection_moves_to_another_reactor_without_losing_a_byte() {
    let mut first = reactor();
    let (stream, mut other) = pair(&mut first);
    other.write_all(b"who ").expect("written");
    let mut bytes = received(&mut first, 4);
    other.write_all(b"goes there").expect("written");
    assert!(first.send(stream, [Bytes::from_static(b"wait: ")]));
    first.detach(stream);
    let socket = until(&mut first, |event| match event {
        Event::Detached { socket, .. } => Some(socket),
        Event::Received { .. } => panic!("a detached stream receives nothing here"),
        _ => None,
    });
    let second = thread::spawn(move || {
        let mut second = reactor();
        let stream = second.attach(socket, LIMITS).expect("taken over");
        let rest = received(&mut second, 10);
        assert!(second.send(stream, [Bytes::from_static(b"friend")]));
        second.finish(stream);
        for _ in 0..20 {
            let soon = now() + Duration::from_millis(10);
            second.poll(Some(soon), &mut Vec::new()).expect("a poll");
        }
        rest
    });
    let mut answer = [0; 12];
    other.read_exact(&mut answer).expect("the answer of both");
    drop(other);
    bytes.extend(second.join().expect("the second is content"));
    assert_eq!(bytes, b"who goes there");
    assert_eq!(&answer, b"wait: friend");
}

#[test]
fn connect_succeeds_from_the_address_asked_for_or_says_why_not() {
    let mut reactor = reactor();
    let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let to = listener.local_addr().expect("its address");
    let from: SocketAddr = "127.0.0.3:0".parse().expect("an address");
    let stream = reactor.connect(Some(from), to, LIMITS).expect("a stream");
    assert!(reactor.send(stream, [Bytes::from_static(b"early")]), "queued until connected");
    until(&mut reactor, |event| matches!(event, Event::Connected { .. }).then_some(()));
    let (mut other, address) = listener.accept().expect("accepted");
    assert_eq!(address.ip(), from.ip());
    reactor.poll(Some(now()), &mut Vec::new()).expect("a poll");
    let mut early = [0; 5];
    other.read_exact(&mut early).expect("what was queued");
    assert_eq!(&early, b"early");
    drop(listener);
    let refused = reactor.connect(None, to, LIMITS).expect("a stream");
    until(&mut reactor, |event| match event {
        Event::Closed { stream, reason } if stream == refused => {
            let kind = reason.expect("a reason").kind();
            assert_eq!(kind, std::io::ErrorKind::ConnectionRefused);
            Some(())
        }
        _ => None,
    });
}

#[test]
fn another_thread_wakes_a_sleeping_reactor() {
    let mut reactor = reactor();
    let (postbox, inbox) = mailbox(reactor.waker(), 2);
    let sender = thread::spawn(move || {
        for number in 0..1000_u32 {
            while postbox.post(number).is_err() {
                thread::yield_now();
            }
        }
    });
    let mut next = 0;
    while next < 1000 {
        until(&mut reactor, |event| matches!(event, Event::Woken).then_some(()));
        while let Some(number) = inbox.take() {
            assert_eq!(number, next);
            next += 1;
        }
    }
    sender.join().expect("all posted");
}

#[test]
fn an_idle_reactor_sleeps() {
    let mut reactor = reactor();
    let (_stream, mut other) = pair(&mut reactor);
    other.write_all(b"traffic").expect("written");
    received(&mut reactor, 7);
    let before = cpu_time();
    let end = now() + Duration::from_millis(500);
    let mut turns = 0;
    while now() < end {
        reactor.poll(Some(end), &mut Vec::new()).expect("a poll");
        turns += 1;
    }
    let used = cpu_time().saturating_sub(before);
    assert!(turns < 10, "it waits in the kernel, {turns} turns");
    assert!(used < Duration::from_millis(5), "it sleeps: {used:?} of CPU in half a second");
}

fn cpu_time() -> Duration {
    let clock = rustix::time::ClockId::ThreadCPUTime;
    let time = rustix::time::clock_gettime(clock);
    Duration::new(time.tv_sec.cast_unsigned(), u32::try_from(time.tv_nsec).expect("nanoseconds"))
}
