//! What the compiler refuses to send to another thread: tests that must not compile (`cargo test --doc`);
//! in no build.
//!
//! The `unsafe impl`s of `log` and `seat` promise that a structure goes from thread to thread, that a
//! change is also read by several threads at one time, and that an answer is sent.

/// Everything may be sent: this compiles, and the others differ from it in one thing each.
///
/// ```
/// use tercet_noderep::{Dispatch, NodeReplicated, Options};
///
/// #[derive(Clone)]
/// struct Last(u8);
///
/// impl Dispatch for Last {
///     type Read<'a> = ();
///     type Found = u8;
///     type Write = u8;
///     type Done = u8;
///
///     fn read(&self, (): ()) -> u8 {
///         self.0
///     }
///
///     fn write(&mut self, change: u8) -> u8 {
///         std::mem::replace(&mut self.0, change)
///     }
/// }
///
/// let mut replica = NodeReplicated::new(Last(0), Options::default()).replica("one");
/// std::thread::spawn(move || replica.read(()));
/// ```
pub(crate) struct Sent;

/// A change that may be sent, but not be looked at by two threads.
///
/// ```compile_fail,E0277
/// use std::cell::Cell;
/// use tercet_noderep::{Dispatch, NodeReplicated, Options};
///
/// #[derive(Clone)]
/// struct Last(u8);
///
/// impl Dispatch for Last {
///     type Read<'a> = ();
///     type Found = u8;
///     type Write = Cell<u8>;
///     type Done = u8;
///
///     fn read(&self, (): ()) -> u8 {
///         self.0
///     }
///
///     fn write(&mut self, change: Cell<u8>) -> u8 {
///         std::mem::replace(&mut self.0, change.get())
///     }
/// }
///
/// let mut replica = NodeReplicated::new(Last(0), Options::default()).replica("one");
/// std::thread::spawn(move || replica.read(()));
/// ```
pub(crate) struct NotShared;

/// A structure that may not be sent.
///
/// ```compile_fail,E0277
/// use std::rc::Rc;
/// use tercet_noderep::{Dispatch, NodeReplicated, Options};
///
/// #[derive(Clone)]
/// struct Last(Rc<u8>);
///
/// impl Dispatch for Last {
///     type Read<'a> = ();
///     type Found = u8;
///     type Write = u8;
///     type Done = u8;
///
///     fn read(&self, (): ()) -> u8 {
///         *self.0
///     }
///
///     fn write(&mut self, change: u8) -> u8 {
///         *std::mem::replace(&mut self.0, Rc::new(change))
///     }
/// }
///
/// let mut replica = NodeReplicated::new(Last(Rc::new(0)), Options::default()).replica("one");
/// std::thread::spawn(move || replica.read(()));
/// ```
pub(crate) struct Structure;

/// An answer that may not be sent.
///
/// ```compile_fail,E0277
/// use std::rc::Rc;
/// use tercet_noderep::{Dispatch, NodeReplicated, Options};
///
/// #[derive(Clone)]
/// struct Last(u8);
///
/// impl Dispatch for Last {
///     type Read<'a> = ();
///     type Found = u8;
///     type Write = u8;
///     type Done = Rc<u8>;
///
///     fn read(&self, (): ()) -> u8 {
///         self.0
///     }
///
///     fn write(&mut self, change: u8) -> Rc<u8> {
///         Rc::new(std::mem::replace(&mut self.0, change))
///     }
/// }
///
/// let mut replica = NodeReplicated::new(Last(0), Options::default()).replica("one");
/// std::thread::spawn(move || replica.read(()));
/// ```
pub(crate) struct Answer;
